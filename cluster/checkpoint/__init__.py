"""What lies on disk: a model in Hugging Face layout, checked before anything is started."""
