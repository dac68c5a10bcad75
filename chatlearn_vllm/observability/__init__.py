"""What a job tells its user: logs, seconds of each phase, metrics, progress."""
