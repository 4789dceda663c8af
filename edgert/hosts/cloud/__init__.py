"""The cloud side of edge-cloud: one part for many homes, and replicas behind a load balancer."""
