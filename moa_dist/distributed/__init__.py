"""Process groups, the mesh, collectives and the monitoring of ranks, without model knowledge."""
