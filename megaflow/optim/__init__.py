"""AdamW over flat buffers and learning-rate schedules."""
