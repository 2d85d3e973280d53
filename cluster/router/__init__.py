"""The router: one asyncio process that turns requests into tokens of some replica, and survives the replica."""
