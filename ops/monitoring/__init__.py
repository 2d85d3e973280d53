"""What watches a cluster: what is declared, what asks for it, and a check of one against the other."""
