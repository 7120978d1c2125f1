"""The arithmetic of docs/contract.md in plain torch: eager reference and traced decomposition."""
