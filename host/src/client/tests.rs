//! Against a server of a few lines that does what the test wants.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Serves every request with the answer that `answer` makes of its number, and keeps connections.
fn server(answer: impl Fn(usize, &mut TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (answer, numbers) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer, numbers) = (stream.unwrap(), Arc::clone(&answer), Arc::clone(&numbers));
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while read_request(&mut reader).is_some() {
                    answer(numbers.fetch_add(1, Ordering::Relaxed), &mut stream);
                }
            });
        }
    });
    address
}

fn read_request(reader: &mut impl BufRead) -> Option<()> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|&count| count > 0)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    reader.read_exact(&mut vec![0; length]).ok()
}

fn chunk(stream: &mut TcpStream, text: &str) {
    // Whoever asked may be gone.
    let _ = stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
}

fn head(stream: &mut TcpStream) {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let _ = stream.write_all(head.as_bytes());
}

fn tokens(stream: &mut TcpStream, count: u32) {
    chunk(stream, &format!("data: {{\"usage\":{{\"completion_tokens\":{count}}}}}\n\n"));
}

/// Three tokens in two events, `gap` before each.
fn three_tokens(stream: &mut TcpStream, gap: Duration) {
    head(stream);
    for count in [1, 3] {
        std::thread::sleep(gap);
        tokens(stream, count);
    }
    chunk(stream, "data: [DONE]\n\n");
    chunk(stream, "");
}

fn traffic(address: SocketAddr, arrivals: Arrivals, milliseconds: u64) -> Traffic {
    Traffic {
        target: Target::parse(&format!("http://{address}")).unwrap(),
        path: "/v1/completions".to_owned(),
        arrivals,
        duration: Duration::from_millis(milliseconds),
        patience: Duration::from_secs(20),
    }
}

#[test]
fn urls() {
    let parsed = |url| Target::parse(url).map(|target| (target.authority, target.prefix)).ok();
    let some = |authority: &str, prefix: &str| Some((authority.to_owned(), prefix.to_owned()));
    assert_eq!(parsed("http://127.0.0.1:8080"), some("127.0.0.1:8080", ""));
    assert_eq!(parsed("http://host/"), some("host:80", ""));
    assert_eq!(parsed("http://host:1/a/b/"), some("host:1", "/a/b"));
    assert_eq!(parsed("http://[::1]:9"), some("[::1]:9", ""));
    for wrong in ["", "host:80", "https://host", "http://", "http:///v1", "http://:80", "http://me@host"] {
        assert_eq!(parsed(wrong), None, "{wrong}");
    }
}

#[test]
fn clients_ask_again_when_they_have_their_answer() {
    let gap = Duration::from_millis(10);
    let address = server(move |_, stream| three_tokens(stream, gap));
    let exchanges = drive(&traffic(address, Arrivals::Closed { clients: 3 }, 200), |_| "{}".to_owned()).unwrap();
    assert_eq!(outcomes(&exchanges), BTreeMap::from([(Outcome::Complete, exchanges.len())]));
    // At least one each, and no more than their gaps leave time for.
    assert!((3..=3 * 11).contains(&exchanges.len()), "{}", exchanges.len());
    for Exchange { due, tokens, ended, .. } in &exchanges {
        assert_eq!(tokens.iter().map(|token| token.1).collect::<Vec<_>>(), [1, 2]);
        assert!(*due + gap <= tokens[0].0 && tokens[1].0 <= *ended, "{due:?} {tokens:?} {ended:?}");
    }
}

#[test]
fn latencies_of_an_open_loop_count_from_when_the_request_was_due() {
    // Each answer takes 30 ms and requests come every 5 ms: an open loop does not wait for answers.
    let address = server(|_, stream| three_tokens(stream, Duration::from_millis(15)));
    let arrivals = Arrivals::Open { per_second: 200.0, seed: 5 };
    let plan = traffic(address, arrivals, 150);
    let due = due_times(200.0, 5, plan.duration);
    let exchanges = drive(&plan, |_| "{}".to_owned()).unwrap();
    let mut seen: Vec<_> = exchanges.iter().map(|exchange| exchange.due).collect();
    seen.sort();
    assert_eq!(seen, due);
    assert!(exchanges.iter().all(|exchange| exchange.tokens[0].0 >= exchange.due + Duration::from_millis(15)));
}

#[test]
fn arrivals_are_a_poisson_process() {
    let duration = Duration::from_secs(1000);
    let times = due_times(50.0, 1, duration);
    assert_eq!(times, due_times(50.0, 1, duration));
    assert_ne!(times, due_times(50.0, 2, duration));
    // 50,000 expected, with a deviation of 224.
    assert!((49_000..51_000).contains(&times.len()), "{}", times.len());
    let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 50.0).collect();
    assert!(gaps.iter().all(|&gap| gap >= 0.0));
    // Of an exponential distribution: 63.2 % are below the mean, and 5 % beyond the threefold.
    let share = |holds: &dyn Fn(f64) -> bool| gaps.iter().filter(|&&gap| holds(gap)).count() as f64 / gaps.len() as f64;
    assert!((share(&|gap| gap < 1.0) - 0.632).abs() < 0.01);
    assert!((share(&|gap| gap > 3.0) - 0.0498).abs() < 0.005);
    for nothing in [0.0, -1.0, f64::NAN] {
        assert!(due_times(nothing, 1, duration).is_empty());
    }
}

#[test]
fn every_way_to_fail_is_counted_as_itself() {
    let address = server(|number, stream| match number % 4 {
        0 => {
            let _ = stream.write_all(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n");
        }
        1 => {
            head(stream);
            tokens(stream, 1);
            chunk(stream, "event: error\ndata: {\"error\":{}}\n\n");
            chunk(stream, "");
        }
        2 => {
            head(stream);
            tokens(stream, 1);
            chunk(stream, "");
        }
        _ => three_tokens(stream, Duration::ZERO),
    });
    let exchanges = drive(&traffic(address, Arrivals::Closed { clients: 1 }, 300), |_| "{}".to_owned()).unwrap();
    let counts = outcomes(&exchanges);
    for outcome in [Outcome::Status(429), Outcome::ErrorEvent, Outcome::CutOff, Outcome::Complete] {
        assert!(counts.get(&outcome).is_some_and(|&count| count > 0), "{outcome}: {counts:?}");
    }
    assert_eq!(counts.len(), 4, "{counts:?}");
}

#[test]
fn a_server_that_is_not_there_or_never_answers() {
    // Taken and given back: nobody listens there.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let exchanges = drive(&traffic(nobody, Arrivals::Closed { clients: 2 }, 50), |_| "{}".to_owned()).unwrap();
    assert_eq!(outcomes(&exchanges).into_keys().collect::<Vec<_>>(), [Outcome::NoConnection]);
    let target = Target::parse(&format!("http://{nobody}")).unwrap();
    assert!(target.get("/health", Duration::from_secs(5)).unwrap_err().to_string().contains(&nobody.to_string()));

    let silent = server(|_, _| {});
    let plan = traffic(silent, Arrivals::Closed { clients: 1 }, 50);
    let exchanges = drive(&Traffic { patience: Duration::from_millis(60), ..plan }, |_| "{}".to_owned()).unwrap();
    assert_eq!(outcomes(&exchanges), BTreeMap::from([(Outcome::TimedOut, 1)]));
}
