"""A gRPC server for asyncio over h2: the public front of a router, where every token of every stream goes through."""
