"""Ray: attaching to a cluster, training workers, reward actors, manifests for Kubernetes."""
