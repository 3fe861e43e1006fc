"""What the reproductions share: tasks, systems, training, result files, tables, reports."""
