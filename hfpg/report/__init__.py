"""What a run tells people: metrics, tables, pages, and the model card."""
