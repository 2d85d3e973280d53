"""What Kubernetes knows of our pods: read, never changed."""
