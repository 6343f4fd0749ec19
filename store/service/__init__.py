"""The model store's HTTP service: JSON-RPC 2.0, uploads, downloads."""
