"""Pure functions on tensors. Each op is a package: reference, public function, implementations."""
