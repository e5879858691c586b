"""SLURM: profiles, submission, and what runs in a job."""
