"""The page's sections, one a file: each from records of one kind, none where there is no record."""
