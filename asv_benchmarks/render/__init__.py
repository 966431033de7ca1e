"""Tables and pictures of the documentation, made from the JSON of the measurements: no number is typed by hand."""
