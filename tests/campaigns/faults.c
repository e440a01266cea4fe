// Loaded before libc (LD_PRELOAD): counts the calls that change files below one folder, and at the
// n-th of them kills the process or fails, so that every moment can be tried and none is left to
// chance. Without faults_arm it does nothing. runs.py builds and drives it. Linux, with glibc.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <unistd.h>

enum { CHANGE = 1, OPEN = 2, READ = 4 };      // classes of calls that are counted
enum { NOTHING, KILL, TEAR, FAIL, FAIL_ON };  // TEAR: kill in the middle of a write; FAIL_ON: from now

static struct {
  int on, log, contents, classes, action, error;
  long count, at;
  long long room;  // bytes that may yet be written; < 0: any
  char folder[PATH_MAX];
} now = {.room = -1};
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

// folder    calls on what lies below it count; log: file descriptor for their list, or -1
// contents  whether the list has the bytes that are written
// at        the call, from 1, at which `action` happens; error: the errno of FAIL and FAIL_ON
// room      bytes that can be written before the disk is full, or -1
void faults_arm(const char* folder, int log, int contents, int classes, long at, int action,
                int error, long long room) {
  snprintf(now.folder, sizeof now.folder, "%s/", folder);
  now.log = log, now.contents = contents, now.classes = classes;
  now.at = at, now.action = action, now.error = error, now.room = room, now.count = 0;
  now.on = 1;
}
long faults_count(void) { return now.count; }

#define REAL(name) \
  static __typeof__(&name) real;  \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

// The absolute path of `path` beside the open directory `at`, or of what `at` itself has open.
static const char* whole(int at, const char* path, char* out) {
  char link[64];
  if (path && path[0] == '/') return path;
  if (at == AT_FDCWD) {
    if (!getcwd(out, PATH_MAX)) return "";
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    const ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n < 0) return "";
    out[n] = 0;
  }
  if (path) {
    const size_t n = strlen(out);
    snprintf(out + n, PATH_MAX - n, "/%s", path);
  }
  return out;
}

static int ours(const char* path) {
  const size_t n = strlen(now.folder) - 1;  // without its /
  return now.on && !strncmp(path, now.folder, n) && (path[n] == '/' || !path[n]);
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// Before a call: its line in the list. Returns 0 to go on, -1 to tear the write, else an errno. The
// lock is held until leave(), so that the list has the order of the calls.
static int enter(int class, const char* name, const char* path, const char* other, long long a,
                 long long b) {
  pthread_mutex_lock(&one_at_a_time);
  if (!(class & now.classes)) return 0;
  ++now.count;
  if (now.log >= 0) dprintf(now.log, "%s\t%s\t%s\t%lld\t%lld\n", name, path, other, a, b);
  if (now.count == now.at && now.action == KILL) die();
  if (now.count == now.at && now.action == TEAR) return -1;
  if (now.count == now.at && now.action == FAIL) return now.error;
  // what makes room, and closing what is open, still works on a full disk
  const int frees = !strcmp(name, "unlink") || !strcmp(name, "rmdir");
  const int full = now.error == ENOSPC || now.error == EDQUOT || now.error == EMFILE;
  if (now.at && now.count >= now.at && now.action == FAIL_ON && !(full && frees)) return now.error;
  return 0;
}
static void leave(void) { pthread_mutex_unlock(&one_at_a_time); }

#define WRAP(type, class, name, path, other, a, b, call) \
  do {                                                   \
    const int bad = enter(class, name, path, other, a, b); \
    type result = -1;                                    \
    if (bad > 0)                                         \
      errno = bad;                                       \
    else                                                 \
      result = (call);                                   \
    if (bad < 0) die();                                  \
    const int kept = errno;                              \
    leave();                                             \
    errno = kept;                                        \
    return result;                                       \
  } while (0)

static ssize_t do_write(int fd, const void* data, size_t n, long long offset,
                        ssize_t (*call)(int, const void*, size_t, long long)) {
  char at[PATH_MAX];
  const char* path = now.on ? whole(fd, NULL, at) : "";
  if (!ours(path)) return call(fd, data, n, offset);
  const long long where = offset >= 0 ? offset : lseek(fd, 0, SEEK_CUR);
  const int bad = enter(CHANGE, "write", path, "", where, (long long)n);
  if (now.log >= 0 && now.contents) {
    for (size_t i = 0; i < n; ++i) dprintf(now.log, "%02x", ((const unsigned char*)data)[i]);
    dprintf(now.log, "\n");
  }
  ssize_t result = -1;
  int error = bad > 0 ? bad : 0;
  size_t size = bad < 0 ? n / 2 : n;
  if (!error && now.room >= 0 && (long long)size > now.room) size = (size_t)now.room;
  if (!error && n && !size && bad >= 0) error = ENOSPC;
  if (!error) {
    result = call(fd, data, size, offset);
    if (result > 0 && now.room >= 0) now.room -= result;
    error = errno;
  }
  if (bad < 0) die();
  leave();
  errno = error;
  return result;
}

static ssize_t plain_write(int fd, const void* data, size_t n, long long offset) {
  REAL(write);
  (void)offset;
  return real(fd, data, n);
}
static ssize_t write_at(int fd, const void* data, size_t n, long long offset) {
  REAL(pwrite64);
  return real(fd, data, n, offset);
}
ssize_t write(int fd, const void* data, size_t n) { return do_write(fd, data, n, -1, plain_write); }
ssize_t pwrite(int fd, const void* data, size_t n, off_t offset) {
  return do_write(fd, data, n, offset, write_at);
}
ssize_t pwrite64(int fd, const void* data, size_t n, off64_t offset) {
  return do_write(fd, data, n, offset, write_at);
}

// Copies within the kernel are refused where we watch; programs then read and write.
ssize_t sendfile(int out, int in, off_t* offset, size_t n) {
  REAL(sendfile);
  char at[PATH_MAX];
  if (now.on && ours(whole(out, NULL, at))) return errno = ENOTSOCK, -1;
  return real(out, in, offset, n);
}
ssize_t sendfile64(int out, int in, off64_t* offset, size_t n) {
  REAL(sendfile64);
  char at[PATH_MAX];
  if (now.on && ours(whole(out, NULL, at))) return errno = ENOTSOCK, -1;
  return real(out, in, offset, n);
}
ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t n, unsigned flags) {
  REAL(copy_file_range);
  char at[PATH_MAX];
  if (now.on && ours(whole(out, NULL, at))) return errno = EOPNOTSUPP, -1;
  return real(in, from, out, to, n, flags);
}

ssize_t read(int fd, void* data, size_t n) {
  REAL(read);
  char at[PATH_MAX];
  const char* path = now.on && (now.classes & READ) ? whole(fd, NULL, at) : "";
  if (!ours(path)) return real(fd, data, n);
  WRAP(ssize_t, READ, "read", path, "", 0, (long long)n, real(fd, data, n));
}

static int do_open(int folder, const char* name, int flags, mode_t mode) {
  REAL(openat);
  char at[PATH_MAX];
  struct stat there;
  const char* path = now.on ? whole(folder, name, at) : "";
  if (!ours(path)) return real(folder, name, flags, mode);
  const int fresh = (flags & O_CREAT) && lstat(path, &there) != 0;
  if (fresh || (flags & O_TRUNC))
    WRAP(int, CHANGE | OPEN, fresh ? "create" : "cut", path, "", 0, mode,
         real(folder, name, flags, mode));
  WRAP(int, OPEN, "open", path, "", flags, 0, real(folder, name, flags, mode));
}
#define MODE                                     \
  mode_t mode = 0;                               \
  if (flags & (O_CREAT | __O_TMPFILE)) {         \
    va_list rest;                                \
    va_start(rest, flags);                       \
    mode = va_arg(rest, mode_t);                 \
    va_end(rest);                                \
  }
int open(const char* path, int flags, ...) {
  MODE return do_open(AT_FDCWD, path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  MODE return do_open(AT_FDCWD, path, flags, mode);
}
int openat(int at, const char* path, int flags, ...) {
  MODE return do_open(at, path, flags, mode);
}
int openat64(int at, const char* path, int flags, ...) {
  MODE return do_open(at, path, flags, mode);
}

#define ON_FILE(name, ...)                                                     \
  char at[PATH_MAX];                                                           \
  const char* path = now.on ? whole(fd, NULL, at) : "";                        \
  if (!ours(path)) return real(__VA_ARGS__);
int fsync(int fd) {
  REAL(fsync);
  ON_FILE(fsync, fd)
  WRAP(int, CHANGE, "fsync", path, "", 0, 0, real(fd));
}
int fdatasync(int fd) {
  REAL(fdatasync);
  ON_FILE(fdatasync, fd)
  WRAP(int, CHANGE, "fsync", path, "", 0, 0, real(fd));
}
int ftruncate(int fd, off_t size) {
  REAL(ftruncate);
  ON_FILE(ftruncate, fd, size)
  WRAP(int, CHANGE, "truncate", path, "", size, 0, real(fd, size));
}
int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  ON_FILE(ftruncate64, fd, size)
  WRAP(int, CHANGE, "truncate", path, "", size, 0, real(fd, size));
}
// Returns the error rather than setting errno. With `room`, as file systems that cannot reserve.
int posix_fallocate64(int fd, off64_t start, off64_t size) {
  REAL(posix_fallocate64);
  ON_FILE(posix_fallocate64, fd, start, size)
  if (now.room >= 0) return EOPNOTSUPP;
  const int bad = enter(CHANGE, "allocate", path, "", start, size);
  const int result = bad > 0 ? bad : real(fd, start, size);
  if (bad < 0) die();
  leave();
  return result;
}
int posix_fallocate(int fd, off_t start, off_t size) { return posix_fallocate64(fd, start, size); }

#define ON_PATH(folder, name, ...)                          \
  char at[PATH_MAX];                                        \
  const char* path = now.on ? whole(folder, name, at) : ""; \
  if (!ours(path)) return real(__VA_ARGS__);
int mkdir(const char* name, mode_t mode) {
  REAL(mkdir);
  ON_PATH(AT_FDCWD, name, name, mode)
  WRAP(int, CHANGE, "mkdir", path, "", 0, mode, real(name, mode));
}
int rmdir(const char* name) {
  REAL(rmdir);
  ON_PATH(AT_FDCWD, name, name)
  WRAP(int, CHANGE, "rmdir", path, "", 0, 0, real(name));
}
int unlink(const char* name) {
  REAL(unlink);
  ON_PATH(AT_FDCWD, name, name)
  WRAP(int, CHANGE, "unlink", path, "", 0, 0, real(name));
}
int unlinkat(int folder, const char* name, int flags) {
  REAL(unlinkat);
  ON_PATH(folder, name, folder, name, flags)
  WRAP(int, CHANGE, flags & AT_REMOVEDIR ? "rmdir" : "unlink", path, "", 0, 0,
       real(folder, name, flags));
}
int rename(const char* from, const char* to) {
  REAL(rename);
  char other[PATH_MAX];
  const char* target = now.on ? whole(AT_FDCWD, to, other) : "";
  ON_PATH(AT_FDCWD, from, from, to)
  WRAP(int, CHANGE, "rename", path, target, 0, 0, real(from, to));
}

// A disk that looks empty to who asks, and is full for who writes.
static int pretend(int result, struct statvfs* found) {
  if (!result && now.on && now.room >= 0) found->f_bavail = found->f_bfree = found->f_blocks = 1 << 30;
  return result;
}
int statvfs(const char* path, struct statvfs* found) {
  REAL(statvfs);
  return pretend(real(path, found), found);
}
int statvfs64(const char* path, struct statvfs64* found) {
  REAL(statvfs64);
  return pretend(real(path, found), (struct statvfs*)found);
}
