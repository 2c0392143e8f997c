"""What a run learned: router telemetry, plots and the report page."""
