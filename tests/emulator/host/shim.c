/* The CUDA runtime as compiled host code of the CuTe DSL sees it: launches go to a callback.
 *
 * Linked with each object under -Bsymbolic, so that these win over the DSL's own runtime. Every
 * function returns 0 for success. What host code may ask and nobody answers is reported by name. */
#include <stddef.h>
#include <stdint.h>

typedef int (*launch_callback)(const void *config, void *kernel, void **arguments);
typedef int (*kernel_callback)(void **kernel, void *library, const char *name);
typedef int (*attribute_callback)(int *value, int attribute);

static launch_callback on_launch;
static kernel_callback on_kernel;
static attribute_callback on_attribute;

void emulator_set(launch_callback launch, kernel_callback kernel, attribute_callback attribute) {
  on_launch = launch;
  on_kernel = kernel;
  on_attribute = attribute;
}

int _cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d,
                         void *e, unsigned f) {
  *library = (void *)code;
  return 0;
}
int _cudaLibraryUnload(void *library) { return 0; }
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  return on_kernel(kernel, library, name);
}
int _cudaLaunchKernelEx(const void *config, void *kernel, void **arguments) {
  return on_launch(config, kernel, arguments);
}
int _cudaGetDevice(int *device) {
  *device = 0;
  return 0;
}
int _cudaGetDeviceCount(int *count) {
  *count = 1;
  return 0;
}
int _cudaSetDevice(int device) { return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
  return on_attribute(value, attribute);
}
int _cudaFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
  return 0;
}
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  *value = 0;
  return 0;
}
/* Host code of the DSL writes tensor maps itself: 1 is cudaErrorInvalidValue. */
int _cuTensorMapEncodeTiled(void) { return 1; }

/* What objects with a TVM-FFI entry need besides. */
typedef void (*dialect_function)(void **arguments);
int cuda_dialect_init_library_once(void **state, dialect_function init, dialect_function load,
                                   void *set_error) {
  int result = 0, device = 0;
  void **library = state;
  void *first[] = {&library, &result}, *second[] = {&library, &device, &result};
  if (*state != NULL) return 0;
  init(first);
  if (result == 0) load(second);
  return result;
}
void cuda_dialect_unload_library_once(void *state) {}
const char *cuda_dialect_get_error_name(int error) { return "an error of the emulator's host"; }
void CuteDSLRT_TVMFFISetRaisedCudaError(const char *kind, int error) {}
