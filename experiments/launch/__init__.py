"""Experiments on TPU VMs, Slurm, Kubernetes, SkyPilot: `python -m experiments.launch`."""
