/* What elfutils' configure would find, written by hand: glibc 2.17 and later, and musl, 64-bit. */
#include <features.h>

#define PACKAGE_NAME "elfutils"
#define PACKAGE_VERSION "0.192"

#define HAVE_DECL_MEMPCPY 1
#define HAVE_DECL_MEMRCHR 1
#define HAVE_DECL_POWEROF2 1
#define HAVE_ERR_H 1
#define HAVE_FALLTHROUGH 1
#define HAVE_VISIBILITY 1
#define HAVE_STRERROR_R 1
#define HAVE_DECL_STRERROR_R 1

#ifdef __GLIBC__
#define HAVE_DECL_RAWMEMCHR 1
#define HAVE_DECL_REALLOCARRAY 0 /* glibc 2.26 */
#define STRERROR_R_CHAR_P 1
#else
#define HAVE_DECL_RAWMEMCHR 0
#define HAVE_DECL_REALLOCARRAY 1
#endif

#include <eu-config.h>
