"""Actions: a Plan carried out on torch.distributed."""
