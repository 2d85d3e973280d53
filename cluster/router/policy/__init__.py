"""Which endpoint a request goes to: filters (must), scorers (should), pickers (choose). Pure."""
