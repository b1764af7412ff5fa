"""The only room that imports ray: training workers, reward actors, sweeps."""
