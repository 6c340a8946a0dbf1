//! Requests over HTTP to a port of this host that a guest answers, numbered, so that one can be told from
//! the next in what was captured.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How many requests go over one connection.
const PER_CONNECTION: u64 = 20;
/// How long a connection or an answer may take.
const ANSWER_WAIT: Duration = Duration::from_secs(30);
/// How long to wait after a failure: the guest's network may not be up yet.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// A port of this host that nobody has now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a port");
    listener.local_addr().expect("it is bound").port()
}

/// Requests `/?n=1` to `/?n=COUNT` from `port`, one after the other, again where one failed; returns how
/// many were answered with status 200 and the text `expected` in it before `limit` was over.
pub fn request(port: u16, count: u64, expected: &str, limit: Duration) -> u64 {
    let start = Instant::now();
    let mut answered = 0;
    while answered < count && start.elapsed() < limit {
        let last = count.min(answered + PER_CONNECTION);
        if ask(port, &mut answered, last, expected).is_err() {
            std::thread::sleep(PAUSE);
        }
    }
    answered
}

/// One connection: asks for what comes after `answered`, up to `last`.
fn ask(port: u16, answered: &mut u64, last: u64, expected: &str) -> io::Result<()> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_WAIT)?;
    stream.set_read_timeout(Some(ANSWER_WAIT))?;
    stream.set_write_timeout(Some(ANSWER_WAIT))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while *answered < last {
        let (number, close) = (*answered + 1, *answered + 1 == last);
        let connection = if close { "close" } else { "keep-alive" };
        let text = format!(
            "GET /?n={number} HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n\r\n"
        );
        stream.write_all(text.as_bytes())?;
        let body = answer(&mut reader)?;
        if !body.contains(expected) {
            return Err(io::Error::other(format!("not what was expected: {body}")));
        }
        *answered = number;
    }
    Ok(())
}

/// Reads one answer of status 200 and returns its body.
fn answer(reader: &mut impl BufRead) -> io::Result<String> {
    let mut reader = reader.take(ANSWER_BYTES_MAX);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if !line.starts_with("HTTP/1.1 200 ") {
        return Err(io::Error::other(format!("answered with {line:?}")));
    }
    let mut length = 0;
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (name, value) = match line.trim_end().split_once(':') {
            Some(field) => field,
            None => break, // the empty line
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    let mut body = String::new();
    reader.take(length).read_to_string(&mut body)?;
    Ok(body)
}

/// How many of the requests 1 to `count` are in `capture`, the bytes of a pcapng.
pub fn captured(capture: &[u8], count: u64) -> u64 {
    let prefix = b"GET /?n=";
    let mut found = vec![false; count as usize + 1];
    for (at, _) in capture
        .windows(prefix.len())
        .enumerate()
        .filter(|(_, part)| part == prefix)
    {
        let rest = &capture[at + prefix.len()..];
        let digits = rest.iter().take(9).take_while(|byte| byte.is_ascii_digit());
        let number = digits.fold(0, |sum, digit| sum * 10 + usize::from(digit - b'0'));
        if let Some(found) = found.get_mut(number) {
            *found = true;
        }
    }
    found.iter().skip(1).filter(|found| **found).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers every request on one connection after the other, except that each third connection is
    /// dropped at once. Ends with the test.
    fn serve() -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a port");
        let port = listener.local_addr().expect("it is bound").port();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let Ok(mut stream) = stream else { continue };
                if number % 3 == 0 {
                    continue;
                }
                let mut reader = BufReader::new(stream.try_clone().expect("it can be cloned"));
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|count| count > 0) {
                    if line == "\r\n" {
                        let _ = stream
                            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n");
                    }
                    line.clear();
                }
            }
        });
        port
    }

    #[test]
    fn every_request_is_answered_though_connections_fail() {
        let port = serve();
        assert_eq!(request(port, 90, "hello", ANSWER_WAIT), 90);
    }

    #[test]
    fn an_answer_that_is_not_the_expected_one_does_not_count() {
        let port = serve();
        assert_eq!(request(port, 1, "bye", Duration::from_millis(600)), 0);
    }

    #[test]
    fn each_captured_request_counts_once() {
        let bytes = b"..GET /?n=1 HTTP..GET /?n=3 HTTP..GET /?n=3 HTTP..GET /?n=12 ..GET /?n=";
        assert_eq!(captured(bytes, 3), 2);
        assert_eq!(captured(bytes, 20), 3);
        assert_eq!(captured(b"GET /?n=99999999999999999999", 5), 0);
    }
}
