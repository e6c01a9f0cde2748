"""`jaxrl bench SUBJECT`: our kernels beside what else JAX offers for the same work, on this machine."""
