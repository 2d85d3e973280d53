"""The command line: parse, call, print. Every command's module is imported only when it runs."""
