"""Everything that measures models and machines, beside what memory and arithmetic allow."""
