"""Where arrays live: the mesh, the rules from logical to mesh axes. The only place that names `PartitionSpec`."""
