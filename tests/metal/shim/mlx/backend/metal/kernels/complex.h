// MLX's complex numbers overload on address spaces, which plain C++ cannot; no kernel here computes with them.
template <typename T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T real, T imag) : real(real), imag(imag) {}
};
typedef complex_t<float> complex64_t;
