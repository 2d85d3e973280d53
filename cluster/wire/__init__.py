"""Where messages become domain values and errors become status codes."""
