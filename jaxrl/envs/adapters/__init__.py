"""Environments of other libraries; each file imports its library only when it is called."""
