"""Many devices: the only home of meshes, partition specs and shard_map."""
