"""Package data of the embedded models; `demo` is the one that is served by default."""
