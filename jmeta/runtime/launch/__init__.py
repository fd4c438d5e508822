"""Start an experiment elsewhere: TPU VMs, Slurm, Kubernetes, SkyPilot, each by its own tools.

Every backend is a pure function from a configuration to steps, which are printed or run.
"""
