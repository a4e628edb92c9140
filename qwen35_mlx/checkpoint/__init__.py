"""The files of a model folder: headers, names, formats, and which tensor is which parameter."""
