"""What is asked of the engine: prompts, tasks, arrival times and recorded request traces."""
