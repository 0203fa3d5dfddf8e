"""torch.library operators: schema, checks, fake, autograd and choice of backend, one file an operation."""
