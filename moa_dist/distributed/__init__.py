"""Process group, mesh, collectives: no model knowledge."""
