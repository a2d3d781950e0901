/* The C client librabbitmq, as a limit: persistent, mandatory, confirmed publishes; consuming with one ack for each 50.

   with_librabbitmq HOST PORT USER PASSWORD VHOST QUEUE quorum|classic BYTES ROLE JOBS [SECONDS]
   ROLE: one | many (up to 1000 in flight) | consume | latency (JOBS round trips spread over SECONDS). Prints JSON.
   Build: cc -O2 with_librabbitmq.c -lrabbitmq */
#if __has_include(<rabbitmq-c/amqp.h>) /* 0.12 and later */
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/tcp_socket.h>
#else
#include <amqp.h>
#include <amqp_tcp_socket.h>
#endif

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

enum { WINDOW = 1000, PREFETCH = 200, ACK_EACH = 50, WARM_UP = 50 };

static void fail(const char *what) {
    fprintf(stderr, "with_librabbitmq: %s\n", what);
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static double cpu_s(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void checked(amqp_rpc_reply_t reply, const char *what) {
    if (reply.reply_type != AMQP_RESPONSE_NORMAL) fail(what);
}

static amqp_connection_state_t open_connection(char **at, int confirms) {
    amqp_connection_state_t c = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(c);
    if (!socket || amqp_socket_open(socket, at[1], atoi(at[2]))) fail("can't connect");
    checked(amqp_login(c, at[5], 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, at[3], at[4]), "login");
    amqp_channel_open(c, 1);
    checked(amqp_get_rpc_reply(c), "channel.open");
    amqp_table_entry_t entry;
    amqp_table_t arguments = {1, &entry};
    if (!strcmp(at[7], "quorum")) {
        entry.key = amqp_cstring_bytes("x-queue-type");
        entry.value.kind = AMQP_FIELD_KIND_UTF8;
        entry.value.value.bytes = amqp_cstring_bytes("quorum");
    } else {
        entry.key = amqp_cstring_bytes("x-max-priority");
        entry.value.kind = AMQP_FIELD_KIND_I32;
        entry.value.value.i32 = 6;
    }
    amqp_queue_declare(c, 1, amqp_cstring_bytes(at[6]), 0, 1, 0, 0, arguments);
    checked(amqp_get_rpc_reply(c), "queue.declare");
    if (confirms) {
        amqp_confirm_select(c, 1);
        checked(amqp_get_rpc_reply(c), "confirm.select");
    }
    return c;
}

static void close_connection(amqp_connection_state_t c) {
    struct timespec nap = {0, 500000000}; /* a channel that closes at once takes acks with it that its quorum queue hasn't had */
    nanosleep(&nap, NULL);
    checked(amqp_channel_close(c, 1, AMQP_REPLY_SUCCESS), "channel.close");
    checked(amqp_connection_close(c, AMQP_REPLY_SUCCESS), "connection.close");
    amqp_destroy_connection(c);
}

static uint64_t published, confirmed, all_up_to;
static char *is_confirmed; /* by tag: acks come singly in any order, and for all tags up to one */

static void publish(amqp_connection_state_t c, char **at, amqp_bytes_t body) {
    char id[32];
    amqp_basic_properties_t p;
    memset(&p, 0, sizeof p);
    snprintf(id, sizeof id, "%028llu", (unsigned long long)published);
    p._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_MESSAGE_ID_FLAG |
               AMQP_BASIC_TYPE_FLAG | AMQP_BASIC_TIMESTAMP_FLAG | AMQP_BASIC_APP_ID_FLAG;
    p.content_type = amqp_cstring_bytes("application/json");
    p.delivery_mode = 2;
    p.message_id = amqp_cstring_bytes(id);
    p.type = amqp_cstring_bytes("invoice.send");
    p.timestamp = (uint64_t)time(NULL);
    p.app_id = amqp_cstring_bytes("bench");
    if (strcmp(at[7], "quorum")) {
        p._flags |= AMQP_BASIC_PRIORITY_FLAG;
        p.priority = 4;
    }
    if (amqp_basic_publish(c, 1, amqp_empty_bytes, amqp_cstring_bytes(at[6]), 1, 0, &p, body)) fail("publish");
    published++;
}

/* Read one frame if there is one within `wait_us`; whatever isn't an ack is an error (a return, a nack, a close). */
static int read_confirm(amqp_connection_state_t c, long wait_us) {
    amqp_frame_t frame;
    struct timeval wait = {wait_us / 1000000, wait_us % 1000000};
    int status = amqp_simple_wait_frame_noblock(c, &frame, &wait);
    if (status == AMQP_STATUS_TIMEOUT) return 0;
    if (status || frame.frame_type != AMQP_FRAME_METHOD || frame.payload.method.id != AMQP_BASIC_ACK_METHOD) fail("not confirmed");
    amqp_basic_ack_t *ack = frame.payload.method.decoded;
    uint64_t tag = ack->delivery_tag;
    if (tag > published) fail("a confirm of what wasn't published");
    for (uint64_t t = ack->multiple ? all_up_to + 1 : tag; t <= tag; t++) {
        confirmed += !is_confirmed[t];
        is_confirmed[t] = 1;
    }
    while (all_up_to < published && is_confirmed[all_up_to + 1]) all_up_to++;
    amqp_maybe_release_buffers(c);
    return 1;
}

static void publish_many(amqp_connection_state_t c, char **at, amqp_bytes_t body, long jobs, unsigned window) {
    uint64_t end = published + jobs;
    while (published < end) {
        publish(c, at, body);
        if (published % 64 == 0)
            while (read_confirm(c, 0)) {}
        while (published - confirmed >= window)
            if (!read_confirm(c, 10000000)) fail("no confirm within 10 s");
    }
    while (confirmed < published)
        if (!read_confirm(c, 10000000)) fail("no confirm within 10 s");
}

static void take(amqp_connection_state_t c, uint64_t *tag) {
    amqp_envelope_t envelope;
    struct timeval wait = {30, 0};
    amqp_maybe_release_buffers(c);
    checked(amqp_consume_message(c, &envelope, &wait, 0), "nothing delivered within 30 s");
    *tag = envelope.delivery_tag;
    amqp_destroy_envelope(&envelope);
}

static void start_consuming(amqp_connection_state_t c, char **at) {
    amqp_basic_qos(c, 1, 0, PREFETCH, 0);
    checked(amqp_get_rpc_reply(c), "qos");
    amqp_basic_consume(c, 1, amqp_cstring_bytes(at[6]), amqp_empty_bytes, 0, 0, 0, amqp_empty_table);
    checked(amqp_get_rpc_reply(c), "consume");
}

int main(int count, char **at) {
    if (count < 11) fail("see the head of with_librabbitmq.c");
    long jobs = atol(at[10]), size = atol(at[8]);
    const char *role = at[9];
    char *text = malloc(size);
    memset(text, 'x', size);
    amqp_bytes_t body = {size, text};
    is_confirmed = calloc(jobs + WARM_UP + 2, 1);
    uint64_t tag = 0;
    if (!strcmp(role, "one") || !strcmp(role, "many")) {
        unsigned window = strcmp(role, "one") ? WINDOW : 1;
        amqp_connection_state_t c = open_connection(at, 1);
        publish_many(c, at, body, WARM_UP, window);
        double cpu = cpu_s();
        int64_t begun = now_ns();
        publish_many(c, at, body, jobs, window);
        double seconds = (now_ns() - begun) / 1e9;
        printf("{\"sent\": %ld, \"per_s\": %f, \"cpu_us\": %f}\n", jobs + WARM_UP, jobs / seconds, (cpu_s() - cpu) / jobs * 1e6);
        close_connection(c);
    } else if (!strcmp(role, "consume")) {
        amqp_connection_state_t c = open_connection(at, 0);
        start_consuming(c, at);
        take(c, &tag);
        double cpu = cpu_s();
        int64_t begun = now_ns();
        for (long n = 2; n <= jobs; n++) {
            take(c, &tag);
            if (n % ACK_EACH == 0 && amqp_basic_ack(c, 1, tag, 1)) fail("ack");
        }
        double seconds = (now_ns() - begun) / 1e9;
        if (jobs % ACK_EACH && amqp_basic_ack(c, 1, tag, 1)) fail("ack");
        printf("{\"ran\": %ld, \"per_s\": %f, \"cpu_us\": %f}\n", jobs, jobs / seconds, (cpu_s() - cpu) / jobs * 1e6);
        close_connection(c);
    } else if (!strcmp(role, "latency") && count > 11) {
        amqp_connection_state_t out = open_connection(at, 1), in = open_connection(at, 0);
        double seconds = atof(at[11]);
        start_consuming(in, at);
        int64_t begun = now_ns();
        printf("{\"ran\": %ld, \"late_ns\": [", jobs);
        for (long n = 0; n < jobs; n++) {
            int64_t wait = begun + (int64_t)(n * seconds * 1e9 / jobs) - now_ns();
            struct timespec nap = {wait / 1000000000, wait % 1000000000};
            if (wait > 0) nanosleep(&nap, NULL);
            int64_t sent = now_ns();
            publish(out, at, body);
            take(in, &tag);
            printf("%s%lld", n ? ", " : "", (long long)(now_ns() - sent));
            if (amqp_basic_ack(in, 1, tag, 0)) fail("ack");
            while (confirmed < published)
                if (!read_confirm(out, 10000000)) fail("no confirm within 10 s");
        }
        printf("], \"per_s\": %f}\n", jobs / ((now_ns() - begun) / 1e9));
        close_connection(out);
        close_connection(in);
    } else {
        fail("ROLE is one, many, consume or latency");
    }
    return 0;
}
