//! The few system calls that the standard library does not have: poll, sends that raise no signal, descriptors over
//! sockets. All sockets here are non-blocking; waiting is poll's, with a deadline.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What to wait for at a descriptor.
pub(super) const READABLE: i16 = libc::POLLIN;
pub(super) const WRITABLE: i16 = libc::POLLOUT;

/// One entry of a [`poll`].
pub(super) fn entry(of: &impl AsRawFd, events: i16) -> libc::pollfd {
    libc::pollfd { fd: of.as_raw_fd(), events, revents: 0 }
}

/// Waits until one of the entries has something to say (in `revents`), at most for `timeout`, or as long as it takes.
/// Returns how many have; 0 after the timeout or a signal.
pub(super) fn poll(entries: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<usize> {
    // Rounded up, so that a wait is not cut into many that take no time.
    let millis = timeout.map_or(-1, |it| i32::try_from(it.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX));
    // SAFETY: the pointer and length are those of a slice that this call alone may write to.
    let ready = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, millis) };
    match ready {
        0.. => Ok(ready as usize),
        _ => match io::Error::last_os_error() {
            why if why.kind() == ErrorKind::Interrupted => Ok(0),
            why => Err(why),
        },
    }
}

/// Waits until a descriptor is ready; an error of kind `TimedOut` at `until`.
pub(super) fn wait_until(of: &impl AsRawFd, events: i16, until: Instant) -> io::Result<()> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if poll(&mut [entry(of, events)], Some(left))? > 0 {
            return Ok(());
        }
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
    }
}

/// Sends all of it, waiting for room until `until`. An error may leave a part sent.
pub(super) fn send_all(stream: &UnixStream, parts: &mut [IoSlice<'_>], until: Instant) -> io::Result<()> {
    let mut parts = parts;
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match send(stream, parts, None) {
            Ok(sent) => IoSlice::advance_slices(&mut parts, sent),
            Err(why) if why.kind() == ErrorKind::WouldBlock => wait_until(stream, WRITABLE, until)?,
            Err(why) if why.kind() == ErrorKind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
    Ok(())
}

/// Sends a few bytes and a file with them, in one piece.
pub(super) fn send_with_file(stream: &UnixStream, bytes: &[u8], file: &File) -> io::Result<()> {
    let sent = send(stream, &[IoSlice::new(bytes)], Some(file))?;
    if sent < bytes.len() { Err(ErrorKind::WriteZero.into()) } else { Ok(()) }
}

/// Room for one descriptor, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);
// SAFETY: arithmetic only.
const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;
// SAFETY: arithmetic only.
const ONE_FILE_BYTES: usize = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as u32) } as usize;

fn send(stream: &UnixStream, parts: &[IoSlice<'_>], file: Option<&File>) -> io::Result<usize> {
    let mut control = Control([0; CONTROL_BYTES]);
    // SAFETY: all zeros is an empty message header.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = parts.as_ptr().cast_mut().cast();
    header.msg_iovlen = parts.len().min(libc::UIO_MAXIOV as usize);
    if let Some(file) = file {
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL_BYTES;
        // SAFETY: the control buffer is aligned and has room for exactly one descriptor, so the first header and its data
        // are inside it.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = ONE_FILE_BYTES;
            libc::CMSG_DATA(first).cast::<RawFd>().write_unaligned(file.as_raw_fd());
        }
    }
    // SAFETY: `IoSlice` has the layout of `iovec`; the slices and the control buffer live through the call, which only reads
    // from them.
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}

/// Receives up to `to.len()` bytes, and a file if one comes with them; 0 bytes at the end.
pub(super) fn receive_with_file(stream: &UnixStream, to: &mut [u8]) -> io::Result<(usize, Option<File>)> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut part = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    // SAFETY: all zeros is an empty message header.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    // Not all of the buffer, whose padding would have room for a second descriptor.
    header.msg_controllen = ONE_FILE_BYTES;
    // SAFETY: bytes go to `to`, control data to `control`; both live through the call and have the lengths given.
    let received =
        unsafe { libc::recvmsg(stream.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel wrote the control data and its length; the first header, if there is one, is inside. There is room
    // for one descriptor, so the kernel hands over no more; it is new in this process and belongs to nobody else.
    let file = unsafe {
        let first = libc::CMSG_FIRSTHDR(&header);
        let is_file = !first.is_null()
            && (*first).cmsg_level == libc::SOL_SOCKET
            && (*first).cmsg_type == libc::SCM_RIGHTS
            && (*first).cmsg_len == ONE_FILE_BYTES;
        is_file.then(|| File::from_raw_fd(libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned()))
    };
    Ok((received as usize, file))
}
