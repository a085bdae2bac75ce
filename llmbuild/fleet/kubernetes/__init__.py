"""A fleet on Kubernetes: the objects that it needs, and the backend whose state is in the cluster."""
