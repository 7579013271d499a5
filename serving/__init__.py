"""Requests over a wire: the gRPC server, its Python clients, and the `jaxinfer` command."""
