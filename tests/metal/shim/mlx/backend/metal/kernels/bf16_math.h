// MLX's overloads for bfloat call Apple's builtins; the shim's functions take bfloat as they are.
