"""lorauter on Ray Serve: one module a deployment, the app builder, its typed configuration."""
