// Stands in for MLX's header of that name: where all address spaces are one, a pointer has one form.
namespace metal {
template <typename T> constexpr constant bool is_empty_v = __is_empty(T);
template <typename...> using void_t = void;
template <typename T> using is_static = metal::bool_constant<__is_empty(remove_cv_t<T>)>;

template <typename P> struct pointer_element {};
#define EMU_POINTER(SPACE) \
  template <typename T> struct pointer_element<SPACE T*> { using type = remove_cv_t<T>; };
EMU_POINTER(thread)
#if defined(EMU_ADDRESS_SPACES)
EMU_POINTER(device)
EMU_POINTER(constant)
EMU_POINTER(threadgroup)
#endif
#undef EMU_POINTER
template <typename P> using pointer_element_t = typename pointer_element<remove_cv_t<P>>::type;
}  // namespace metal
