/* The CUDA entry points that the host code of a CuTe-DSL kernel calls, forwarded to Python.

   Linked with every object file. Whatever is not here is an undefined symbol, which the linker
   refuses by name: nothing is answered with a silent 0. Names and arguments are those of the DSL's
   own runtime, libcute_dsl_runtime.so 4.8.1, which has a driver behind them. */
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

typedef struct {
  int (*load)(void **library, const void *code);
  int (*kernel)(void **kernel, void *library, const char *name);
  int (*device_attribute)(int *value, int attribute);
  int (*kernel_attribute)(int *value, int attribute, void *kernel);
  int (*set_attribute)(void *kernel, int attribute, int value);
  int (*launch)(const void *config, void *kernel, void **arguments);
  int (*print)(const char *text);
} callbacks;

static callbacks python;

void emulator_connect(const callbacks *given) { python = *given; }

int _cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d,
                         void *e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f; /* options of the JIT: none are given */
  return python.load(library, code);
}

int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  return python.kernel(kernel, library, name);
}

int _cudaGetDevice(int *device) {
  *device = 0;
  return 0;
}

int _cudaGetDeviceCount(int *count) {
  *count = 1;
  return 0;
}

int _cudaSetDevice(int device) { return device == 0 ? 0 : 101; /* cudaErrorInvalidDevice */ }

int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  return python.device_attribute(value, attribute);
}

int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  (void)device;
  return python.kernel_attribute(value, attribute, kernel);
}

int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
  (void)device;
  return python.set_attribute(kernel, attribute, value);
}

int _cudaFuncSetAttribute(void *kernel, int attribute, int value) {
  return python.set_attribute(kernel, attribute, value);
}

int _cudaLaunchKernelEx(const void *config, void *kernel, void **arguments) {
  return python.launch(config, kernel, arguments);
}

/* What follows is not CUDA's: how the DSL's TVM-FFI functions load their code once, and fail. */

int cuda_dialect_init_library_once(void **state, int (*init)(void **library),
                                   int (*load)(void **library, int device),
                                   void (*set_error)(const char *kind, const char *message)) {
  void *library = NULL;
  if (*state) return 0;
  int code = init(&library);
  if (!code && load) code = load(&library, 0);
  if (code) {
    char message[64];
    snprintf(message, sizeof message, "loading the kernels: CUDA error %d", code);
    set_error("RuntimeError", message);
    return -1;
  }
  *state = library;
  return 0;
}

void cuda_dialect_unload_library_once(void **state) { *state = NULL; }

void CuteDSLRT_TVMFFISetRaisedCudaError(void (*set_error)(const char *, const char **, int),
                                        int code) {
  char text[16];
  const char *parts[] = {"CUDA error ", text};
  snprintf(text, sizeof text, "%d", code);
  if (set_error) set_error("RuntimeError", parts, 2);
}

/* Host code explains some refusals on standard output. */

int printf(const char *format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  python.print(text);
  return length;
}

int puts(const char *text) {
  python.print(text);
  return 0;
}

int putchar(int character) {
  char text[2] = {(char)character, 0};
  python.print(text);
  return character;
}
