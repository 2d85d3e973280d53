"""Generated from protos/cluster/v1 by ops/protos; never edited by hand."""
