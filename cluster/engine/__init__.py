"""One replica's runtime: a pure scheduler, a leader that plans and samples, ranks that run what they are told."""
