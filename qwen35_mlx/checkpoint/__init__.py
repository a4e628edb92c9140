"""What a model folder holds: headers, names, formats, and which tensor is which parameter."""
