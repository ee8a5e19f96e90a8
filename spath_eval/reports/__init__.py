"""Reports: what a record says, as text for a reader or a program. They look at nothing but the record."""
