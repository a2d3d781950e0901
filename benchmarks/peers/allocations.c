/* Counts allocations: preloaded (LD_PRELOAD) into a worker that runs with PYTHONMALLOC=malloc. glibc only.
   Build: cc -O2 -shared -fPIC allocations.c */
#include <stddef.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

static unsigned long long count;

static void one(void) { __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED); }

unsigned long long bench_allocations(void) { return __atomic_load_n(&count, __ATOMIC_RELAXED); }

void *malloc(size_t size) {
    one();
    return __libc_malloc(size);
}

void *calloc(size_t items, size_t size) {
    one();
    return __libc_calloc(items, size);
}

void *realloc(void *block, size_t size) {
    one();
    return __libc_realloc(block, size);
}
