"""The model: transformers' code, DeepSpeed's sharded layers, our weights, KV cache, attention and sampler."""
